"""Examples: how the demo model was made."""
