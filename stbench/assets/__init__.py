"""Small weights shipped with the package; made by the files in scripts/."""
