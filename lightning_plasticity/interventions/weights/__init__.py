"""Read, draw and replace the weights of layers."""
