"""What is made on the workstation to be used on the competition machine."""
