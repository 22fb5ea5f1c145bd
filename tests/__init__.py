"""The tests of dsmtpd, a module for each module of the package."""
