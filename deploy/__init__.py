"""Ray, the command line and the demo model. The only package that imports ray."""
