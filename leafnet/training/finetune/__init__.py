"""Training the last stages of the network together with the head."""
