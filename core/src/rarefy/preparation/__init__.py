"""Steps that make a network ready for others; of no family, so that core has them."""
