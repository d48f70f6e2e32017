"""What a person looks at: pictures of features and norms, and one self-contained page that holds them."""
