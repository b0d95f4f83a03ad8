"""What all long jobs share: progress, stopping, workers, finished steps on disk, the run record."""
