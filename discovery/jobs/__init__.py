"""What every long job shares: progress, stopping, workers, sealed steps, the run record."""
