"""Scripts, configs and names of TRL's trainers of diffusion models."""
