"""What a run shows, and leaves in its workdir."""
