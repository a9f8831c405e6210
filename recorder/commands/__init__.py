"""The commands that make recordings and look into them."""
