"""Infrastructure: run folders, files, console, device, several processes, seeds."""
