<?php
// Sends one mail with PHPMailer.

use PHPMailer\PHPMailer\PHPMailer;

require '/usr/share/php/libphp-phpmailer/autoload.php';

$mail = new PHPMailer(true);
$mail->isSMTP();
$mail->Host = getenv('SMTP_HOST');
$mail->Port = (int) getenv('SMTP_PORT');
$mail->SMTPSecure = match (getenv('SMTP_TLS')) {
    'none' => '',
    'starttls' => PHPMailer::ENCRYPTION_STARTTLS,
    'implicit' => PHPMailer::ENCRYPTION_SMTPS,
};
$mail->SMTPAutoTLS = false;
if (getenv('SMTP_CA')) {
    $mail->SMTPOptions = ['ssl' => ['cafile' => getenv('SMTP_CA')]];
}
$mail->SMTPAuth = true;
$mail->Username = getenv('SMTP_USER');
$mail->Password = getenv('SMTP_PASSWORD');
$mail->Timeout = 20;

$mail->setFrom('app@example.com');
$mail->addAddress('user@example.com');
$mail->Subject = 'Hello from phpmailer';
$mail->Body = 'It works.';
$mail->send();
