"""A shop whose orders are handled after the customer has been answered."""
