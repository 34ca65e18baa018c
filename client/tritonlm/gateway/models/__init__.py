"""The models of this gateway's Tritons: loaded at a request, unloaded when idle, added, adapted and trained."""
