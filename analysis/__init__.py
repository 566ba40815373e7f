"""What trained models do: where they look, what reaches a patch, where two of them differ."""
