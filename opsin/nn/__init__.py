"""Small layers that hold weights and call the kernels."""
