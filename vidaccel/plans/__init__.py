"""Plans of computed steps and the policy files that hold them. No torch, no diffusers."""
