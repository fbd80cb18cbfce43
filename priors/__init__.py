"""What sampling needs: priors over codes, and their files."""
