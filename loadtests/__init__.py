"""Load on a running server: Locust users that chat, scenarios with seeds, and a report. They speak HTTP only."""
