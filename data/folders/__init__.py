"""What a folder of pictures holds: which files are pictures, what captions they have, what is left out."""
