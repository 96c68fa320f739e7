"""nnU-Net: model folders of version 2 as users have them, and what every network of that family shares."""
