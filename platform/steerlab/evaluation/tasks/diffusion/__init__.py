"""Tasks on the images that a diffusion model draws."""
