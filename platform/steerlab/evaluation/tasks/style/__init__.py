"""Tasks on the style and the subject of generated texts."""
