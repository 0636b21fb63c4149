"""What certtool is measured beside, each as its own documentation suggests."""
