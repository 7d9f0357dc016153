"""Times slices on the devices, and plans from these times."""
