"""Where rows of figures go."""
