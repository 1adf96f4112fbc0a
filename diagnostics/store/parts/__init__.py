"""Part files: written whole, merged as they pile up, read no further than needed."""
