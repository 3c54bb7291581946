"""Steps that make up for what others did to a network; of no family, so that core has them."""
