"""Meshes, where arrays lie on them, the method across devices, and what chips can do."""
