"""The engines behind the gateway: started, connected, proven to steer, watched, and chosen by load."""
