import java.lang.instrument.Instrumentation;

/** Loaded by the server into itself, with the name of the class that is waiting for an Instrumentation. */
public final class EntitlementAgent {
    private EntitlementAgent() {}

    public static void agentmain(String waiting, Instrumentation instrumentation) throws ReflectiveOperationException {
        ClassLoader.getSystemClassLoader()
            .loadClass(waiting)
            .getMethod("initialize", Instrumentation.class)
            .invoke(null, instrumentation);
    }
}
