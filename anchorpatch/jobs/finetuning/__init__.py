"""The parts of fine-tuning: settings, plan, data and budget (section 4.3)."""
