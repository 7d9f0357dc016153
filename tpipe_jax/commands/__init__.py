"""What each program in `launch/` does."""
