"""A page to talk to a policy, or to two side by side and blind; what people notice there becomes data."""
