"""Meshes, where arrays lie on them, the method across devices, and what a program costs on them."""
