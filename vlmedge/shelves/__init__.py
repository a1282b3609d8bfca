"""The contracts that a family, a scheme, an engine or a device keeps, and how each is found."""
