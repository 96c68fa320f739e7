"""STU-Net: 104 structures of the body in CT, in four sizes, with nnU-Net's conventions of version 1."""
