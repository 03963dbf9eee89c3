"""All that needs the Spark session or its JVM: session, jars, progress, shipping to workers."""
