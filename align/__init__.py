"""How the model learns, is judged and is released."""
