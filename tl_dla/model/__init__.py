"""How a model is read: one reader a part."""
