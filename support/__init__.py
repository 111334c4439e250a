"""What any training script needs and nobody reads the paper for."""
