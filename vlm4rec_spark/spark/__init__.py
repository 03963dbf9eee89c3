"""Everything that asks the Spark session or its JVM for something: the session, jars, progress, shipping files to workers."""
