"""One YAML file per recipe."""
