"""From painted pieces to the results of a restoration: the image, what was done to it, and where."""
