"""What a program costs on the devices it is compiled for."""
