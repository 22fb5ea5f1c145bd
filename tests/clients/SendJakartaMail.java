// Sends one mail with Jakarta Mail.

import jakarta.mail.Message;
import jakarta.mail.Session;
import jakarta.mail.Transport;
import jakarta.mail.internet.InternetAddress;
import jakarta.mail.internet.MimeMessage;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Map;
import java.util.Properties;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocketFactory;
import javax.net.ssl.TrustManagerFactory;

class SendJakartaMail {
    public static void main(String[] args) throws Exception {
        Map<String, String> env = System.getenv();
        String tls = env.get("SMTP_TLS");

        Properties properties = new Properties();
        properties.put("mail.smtp.host", env.get("SMTP_HOST"));
        properties.put("mail.smtp.port", env.get("SMTP_PORT"));
        properties.put("mail.smtp.auth", "true");
        properties.put("mail.smtp.socketFactory.fallback", "false");
        properties.put("mail.smtp.connectiontimeout", "20000");
        properties.put("mail.smtp.timeout", "20000");
        if (!tls.equals("none")) {
            properties.put("mail.smtp.starttls.enable", tls.equals("starttls"));
            properties.put("mail.smtp.starttls.required", tls.equals("starttls"));
            properties.put("mail.smtp.ssl.enable", tls.equals("implicit"));
            properties.put("mail.smtp.ssl.checkserveridentity", "true");
            properties.put("mail.smtp.ssl.socketFactory", trusting(Path.of(env.get("SMTP_CA"))));
        }

        MimeMessage message = new MimeMessage(Session.getInstance(properties));
        message.setFrom("app@example.com");
        message.setRecipient(Message.RecipientType.TO, new InternetAddress("user@example.com"));
        message.setSubject("Hello from JakartaMail");
        message.setText("It works.");
        Transport.send(message, env.get("SMTP_USER"), env.get("SMTP_PASSWORD"));
    }

    /** Trusts only the CA in a PEM file, which Java's own settings cannot name. */
    static SSLSocketFactory trusting(Path pem) throws Exception {
        KeyStore store = KeyStore.getInstance(KeyStore.getDefaultType());
        store.load(null, null);
        try (InputStream in = Files.newInputStream(pem)) {
            CertificateFactory certificates = CertificateFactory.getInstance("X.509");
            store.setCertificateEntry("ca", certificates.generateCertificate(in));
        }
        TrustManagerFactory trust =
                TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(store);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);
        return context.getSocketFactory();
    }
}
