"""Pictures of numbers and names; nothing here knows a model or a result."""
