"""What the demo page does, without the page: settings, jobs, runs, previews and pictures."""
