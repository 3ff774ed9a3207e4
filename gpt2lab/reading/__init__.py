"""From YAML to typed settings: text with its lines, layers over one another, and conversion by the declared types."""
