"""`baton chaos`: a real cluster under real load and seeded faults, and the proof that nothing came of them."""
