package org.opensaml.saml.saml2.core;

/** Of OpenSAML; the server looks for it when it has its security module, and never uses it without a SAML realm. */
public interface StatusResponseType {}
