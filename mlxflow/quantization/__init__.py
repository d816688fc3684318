"""From dense weights to packed ones."""
